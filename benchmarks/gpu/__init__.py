"""Everything that a GPU has to show, in minutes: `script/gpu-report`."""
