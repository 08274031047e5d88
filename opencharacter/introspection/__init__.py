"""The distilled model writes about itself and learns that: from reflection to sft."""
