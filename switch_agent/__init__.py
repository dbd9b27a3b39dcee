# SPDX-License-Identifier: Apache-2.0
"""OpenFlow: the NAT's twin on the switch."""
