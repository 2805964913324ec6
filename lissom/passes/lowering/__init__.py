"""Exact passes that lower a program to the fast operators of a backend."""
