"""A virtual accelerator: the code that runs on CUDA, on a CPU, with a model of CUDA beside it that sees mistakes.

The engine, the collectives (gloo) and every number are real: operations are carried out at once, in the order in
which the host issues them. What is modelled is *when* an accelerator would have carried them out:

| module        | models                                                                                          |
|---------------|-------------------------------------------------------------------------------------------------|
| `streams`     | streams, events, the host: what happens before what (vector clocks)                             |
| `memory`      | who last read and wrote each byte, and what the caching allocator may hand out again            |
| `watch`       | torch operations as accesses to memory on the current stream                                    |
| `comm`        | collectives as NCCL runs them: on a stream of their group's own, waited for by streams          |
| `accelerator` | the device that DeepSpeed is given                                                              |
| `order`       | do all ranks issue the collectives of all groups in one order?                                  |
| `costs`       | how long operations and collectives take, for virtual time                                      |
| `schedule`    | when they run: each as soon as what it follows is over, transfers sharing their link            |
| `fleet`       | one real rank among any number of imagined ones                                                 |

What it cannot see. Device and host memory are one here: only what `cpu()` has copied counts as being on the host. A
missing copy between them is no error, other pageable copies count as no synchronisation, and code that asks whether a
tensor is on the device is told that it is, so what is offloaded takes the way of what is not. Autograd runs on the
caller's thread, where CUDA has a thread per device that puts each backward operation on the stream of its forward
operation; with one compute stream that is the same. Kernels inside an operation, and NCCL's own faults, are not known.
"""
