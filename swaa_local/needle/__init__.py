"""The bundled model: its file, its documents and their words."""
