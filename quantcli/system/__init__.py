"""The machine: cores, memory, files, progress, text, functions of the user."""
