"""The attention family: tile and decode attention, split keys, interval masks."""
