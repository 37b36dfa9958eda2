"""Drop-ins for other libraries: their names, their semantics."""
