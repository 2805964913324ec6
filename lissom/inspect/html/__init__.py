"""The report of a compile as one HTML file: its data, identical layers, and the page. Reads only."""
