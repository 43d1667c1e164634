"""What a run costs in energy and carbon: counters of the machine, laps, formulas."""
