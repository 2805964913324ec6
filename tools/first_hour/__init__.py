"""The first hour on a machine with a GPU: tests, numbers, speed and profiles, unattended and resumable.

python -m tools.first_hour --out DIR
"""
