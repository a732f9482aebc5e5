"""The attention family: tile and decode attention, their split over keys, online softmax, interval masks."""
