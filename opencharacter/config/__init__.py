"""The configuration: `Recipe` decides what a run produces, `Placement` where it executes."""
