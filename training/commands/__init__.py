"""The commands besides train: thin mains. May import any folder of `training`; none imports it."""
