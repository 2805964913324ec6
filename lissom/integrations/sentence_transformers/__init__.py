"""Models of Sentence Transformers: compiled whole, saved and loaded. Importing the package imports none of them."""
