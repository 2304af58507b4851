"""From a match to the calls that replace its nodes."""
