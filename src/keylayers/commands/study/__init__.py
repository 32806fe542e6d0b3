# SPDX-License-Identifier: Apache-2.0
"""Many runs as one: every combination of models, data, seeds, methods and budgets, each done once.

`plan` turns a YAML file into cells, each of which is a few of keylayers' own commands in a folder
named by a hash of its inputs; `cell` runs one, `workers` run many, `table` gathers the results.
"""
