"""Program edits shared by several passes."""
