"""The program: its nodes, their types, how it is edited, run and printed. Nothing here knows of passes."""
