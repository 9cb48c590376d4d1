"""What a run says while it trains: `metering` measures, `tracking` and `trackers` write, `report` makes the record."""
