"""From a folder of medical files to a cache of pixels."""
