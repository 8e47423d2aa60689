"""What a generator and its tokenizer get wrong together, and where; start at `diagnose.diagnose`.

A diagnostic is a pure function over tensors and a function that makes a `findings.Finding` of it for a `Subject`; it is
a row of `diagnose.PARTS`. A finding holds all numbers that are shown, so that the page and diagnosis.json need to know
nothing of any one diagnostic.
"""
