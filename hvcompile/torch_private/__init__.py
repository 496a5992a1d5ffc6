"""The one door to private torch, and to private torchao: every name that they do not document as public is used here.

The linter and ``tests/test_private_torch.py`` refuse such a name anywhere else. Each stands here with the reason why
nothing public does, beside its import or its use. Every one was checked on torch 2.11.0 and 2.13.0 (torchao 0.18.0);
where the two differ, that is said there. What a new version of torch may break is therefore this folder alone.

- ``fakes``: fake tensors and symbolic sizes
- ``dynamo``: what Dynamo recorded, compiles and traces
- ``frames``: whose the frames are that Dynamo compiles, and when it must compile one anew
- ``limits``: how often Dynamo compiles a function
- ``lowering``: Inductor and AOTAutograd
- ``kernels``: operators that torch keeps to itself
- ``storages``: storages, and tensors without memory
- ``distributed``: process groups by name, collectives that are not waited for at once
- ``absent_gpu``, ``absent_attention``: a GPU that is not there
- ``generated_code``: Inductor's code, run on fake tensors
- ``torchao``: its import, and its float8 primitives
"""
