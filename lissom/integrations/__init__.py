"""Lissom inside other libraries: one package per library, whose modules import it, and the registration, which does not."""
