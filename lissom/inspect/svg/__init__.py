"""Pictures of programs, attention patterns and tensor-parallel plans as SVG, which need no network. Reads only."""
