"""The conformance runner of EMP/1: does a module, or a broker, do what docs/emp.md says?

    wire               core   frames as docs/emp.md has them, checked with msgpack alone; how they are shown
    play               core   one check as a script over frames and time, and its verdict
    referee            core   rules that hold all the time, watched while the scripts play
    module_stage       core   the scripted broker that a module under test meets
    module_attaching   core   what every module has to do, check by check
    module_receiving   core   what one has to do that is sent something
    module_sending     core   what one has to do that sends, asks or retains
    module_checks      core   all of these, and the survey that tells which apply
    broker_stage       core   the scripted modules that a broker under test meets
    broker_checks      core   what a broker has to do
    report             core   verdicts as text and as JSON
    shell                     processes and sockets around it

The scripted broker shares the frames' codec with the runtime (and every frame is checked a second time without it), and
nothing else: it is written from the page, so that it does not take our own broker for the norm.
`docs/conformance.md` says how to use it.
"""
