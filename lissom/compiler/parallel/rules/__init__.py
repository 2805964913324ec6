"""How the placement of what a call reads decides that of what it yields, operator by operator."""
