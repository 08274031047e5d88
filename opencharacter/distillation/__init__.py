"""From a constitution to a DPO adapter: prompts, teacher, student, pairs, dpo."""
