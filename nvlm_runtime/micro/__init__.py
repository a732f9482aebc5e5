"""The bundled micro models: their documents, questions, training and evaluation."""
