"""What is implemented: the works, the presets with their equations, and the table of variants."""
