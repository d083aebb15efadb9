"""A page to make panoramas in a browser: script/studio. Nothing in the container needs it."""
