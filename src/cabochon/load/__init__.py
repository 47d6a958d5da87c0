"""From a folder to a model, or to a refusal that says why: plan first, bytes afterwards."""
