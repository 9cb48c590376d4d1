"""What a run reports while it trains: `metering` measures, `report` builds the records, `tracking` and `trackers` write
them."""
