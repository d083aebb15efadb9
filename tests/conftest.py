from hypothesis import settings

# How long an example takes is the machine's affair; a slow one is no failure.
settings.register_profile("panorama", deadline=None)
settings.load_profile("panorama")
