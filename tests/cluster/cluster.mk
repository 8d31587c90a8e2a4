# The development cluster and the images; included by the Makefile.
.PHONY: cluster-up cluster-down cluster-shell images test-cluster test-faults

KIND ?= light gpu
# Where root's machine has no Apptainer but the name in tests/cluster/bin, the development cluster's builds.
IMAGE_BUILDER := $(if $(filter 0,$(shell id -u)),$(if $(filter-out %/tests/cluster/bin/apptainer,$(shell command -v apptainer)),,tests/cluster/in-cluster)) \
  env BASE=$(call arg,BASE) containers/build

cluster-up:  ## start a throwaway Slurm with Apptainer on this machine (root, Debian); ACCOUNTING=1 adds slurmdbd
	@tests/cluster/cluster up
	@echo "cluster-up: it runs; make cluster-shell opens a shell in it, make cluster-down ends it"

cluster-down:  ## stop it and everything that runs in it; images and runs stay
	@tests/cluster/cluster down
	@echo "cluster-down: nothing of it runs; images and runs stand"

cluster-shell:  ## a shell in it, as its ordinary user
	@tests/cluster/cluster shell

images:  ## build the Apptainer images that are not there yet: KIND="gpu cpu light" BASE=name@sha256:... SARM_IMAGES=...
	@for kind in $(call listed,KIND); do $(IMAGE_BUILDER) $$kind; done

# Sent first and looked at last: the faults are done to another run meanwhile.
REHEARSAL := tests/cluster/test_rehearsal.py

test-cluster: setup  ## a whole run on a real Slurm in real images, four faults, and the reference run in small; skipped where there is no root or Debian
	@tests/cluster/with-cluster $(PY) -m pytest -m cluster --durations=0 $(REHEARSAL)::test_three_commands_send_the_run_and_refuse_what_would_stop_it_later \
	  tests/cluster/test_run.py $(REHEARSAL)::test_its_report_says_what_was_opened_and_stands_beside_the_seeds $(PYTEST_ARGS)

test-faults: setup  ## every fault that a run is to outlive, on a real Slurm with accounting
	@ACCOUNTING=1 tests/cluster/with-cluster $(PY) -m pytest -m cluster --durations=0 tests/cluster $(PYTEST_ARGS)
