"""Distillation of a constitution into a DPO adapter: prompts, teacher, student, pairs, DPO."""
