"""Everything that the service has to withstand, in minutes: `script/attack`."""
