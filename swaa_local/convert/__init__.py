"""`swaa-local convert`: what is given is resolved, a plan is made and checked, and then it is done."""
