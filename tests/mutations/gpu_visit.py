TESTS = ("tests/bench/test_gpu_visit.py", "-k", "not whole and not files")
PROCESSES, WORKER = "bench/gpu/processes.py", "bench/gpu/worker.py"
MUTATIONS = [
    (PROCESSES, "os.killpg(process.pid, signal.SIGKILL)", "process.kill()", "a child stays"),
    (PROCESSES, 'while status == "failed":', "while False:", "nothing is run"),
    (PROCESSES, "if left < LEAST:", "if left < 0:", "a step begins without time"),
    (WORKER, "    except Exception as error:", "    except KeyError as error:", "a part stops the next"),
    (WORKER, "if part[0] not in begun:", "if True:", "what died is run again"),
]
