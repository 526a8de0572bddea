"""The embedded world: scenes that are photographed, described and questioned, all true by
construction."""
