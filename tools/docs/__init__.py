"""The generators of the documentation: pages of passes, outputs, tables, the site."""
