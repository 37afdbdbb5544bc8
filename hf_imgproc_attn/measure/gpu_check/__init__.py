"""``imgproc-attn gpu-check``: everything that only a GPU can tell, in one command that fits into a quarter of an hour.

The parts, in order of value (:data:`.parts.PARTS`), consist of cases. A case that fails is recorded with its
traceback and stops nothing else:

    module          what it does
    parts           what a part and a case are; the table of parts
    runner          owns the time: parts in order, limits, the record after every case, ``--resume``
    child, worker   the two ends of a process that runs cases: it can crash or hang, the runner cannot
    tensors         filters on plain tensors: inputs, exact results, errors
    part_*          the cases
    choices         record -> which back-end is fastest on which shape
    report          record -> docs/gpu.md, a paragraph of docs/compatibility.md, the table of back-ends

All parts need nothing but torch, transformers, accelerate and triton, but for part e, which also reads Parquet files
(pyarrow) of JPEG or PNG images (pillow). ``--device cpu`` rehearses all of it on tiny sizes, with Triton in its
interpreter.
"""
