"""How results read, as lines of Markdown: a module for each kind of measurement, misses included."""
