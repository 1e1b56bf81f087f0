"""The lab: train, compare and measure, with every number next to its spread over seeds.

Nothing is imported here, so that the command line starts quickly; the parts are

:mod:`~manifold_mixup.lab.config`      one validated experiment; recipes are TOML files of it
:mod:`~manifold_mixup.lab.data`        name -> training, validation and test examples
:mod:`~manifold_mixup.lab.models`      the networks
:mod:`~manifold_mixup.lab.methods`     what is compared, one file per method
:mod:`~manifold_mixup.lab.training`    the loop, its checkpoints and its resumption
:mod:`~manifold_mixup.lab.experiment`  methods x seeds -> runs -> records
"""
