"""Program edits shared by several passes. An edit that one pass needs stays with that pass."""
