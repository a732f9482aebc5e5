"""Everything that one visit to a GPU must bring home: `python -m bench.gpu`."""
