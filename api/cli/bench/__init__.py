"""`paystream bench`: what the pipeline does on this machine, what a payment costs, and whether the goals are reached.

Flow: phases (one kind of load after the other): load (requests) -> the running stack -> outcomes (what a reader of payment-events sees) and processes
(CPU, memory) -> figures (what is told) -> command (shows and writes it). serial_worker is what the pipeline is compared with.
"""
