/* SPDX-License-Identifier: Apache-2.0
 *
 * The lists of nat.h as arrays, from which the engine makes its enums, dtypes and dictionaries.
 */
#ifndef ENGINE_TABLES_H
#define ENGINE_TABLES_H

#include "nat.h"

struct name_row {
    const char *name, *text, *help;
};
struct field_row {
    const char *name;
    uint32_t offset, size;
};

#define VERDICT_ROW(name, text, help) {#name, text, help},
static const struct name_row verdict_rows[] = {NAT_VERDICTS(VERDICT_ROW)};

#define COUNTER_ROW(name, help) {#name, offsetof(struct nat_stats, name), sizeof(uint64_t)},
static const struct field_row counter_rows[] = {NAT_COUNTERS(COUNTER_ROW) NAT_GAUGES(COUNTER_ROW)};

#define RECORD_ROW(type, name) {#name, offsetof(struct nat_record, name), sizeof(type)},
static const struct field_row record_rows[] = {NAT_RECORD_FIELDS(RECORD_ROW)};

#define EVENT_ROW(type, name) {#name, offsetof(struct nat_event, name), sizeof(type)},
#define EVENT_RECORD_ROW(type, name)                                                                         \
    {#name, offsetof(struct nat_event, session) + offsetof(struct nat_record, name), sizeof(type)},
static const struct field_row event_rows[] = {NAT_EVENT_FIELDS(EVENT_ROW)
                                                  NAT_RECORD_FIELDS(EVENT_RECORD_ROW)};

#define NEIGHBOUR_ROW(type, name) {#name, offsetof(struct nat_neighbour_record, name), sizeof(type)},
static const struct field_row neighbour_rows[] = {NAT_NEIGHBOUR_FIELDS(NEIGHBOUR_ROW)};

#define HOST_ROW(type, name) {#name, offsetof(struct nat_host_record, name), sizeof(type)},
static const struct field_row host_rows[] = {NAT_HOST_FIELDS(HOST_ROW)};

#define STEP_NAME_ROW(name, text) {#name, text, ""},
static const struct name_row step_name_rows[] = {NAT_STEPS(STEP_NAME_ROW)};

#define STEP_ROW(type, name) {#name, offsetof(struct nat_step, name), sizeof(type)},
static const struct field_row step_rows[] = {NAT_STEP_FIELDS(STEP_ROW)};

#define TRACE_ROW(type, name) {#name, offsetof(struct nat_trace_entry, name), sizeof(type)},
static const struct field_row trace_rows[] = {NAT_TRACE_FIELDS(TRACE_ROW)};

#define TRACE_FILTER_ROW(type, name) {#name, offsetof(struct nat_trace, name), sizeof(type)},
static const struct field_row trace_filter_rows[] = {NAT_TRACE_FILTER_FIELDS(TRACE_FILTER_ROW)};

#define ROWS(rows) (sizeof(rows) / sizeof(rows)[0])
enum {
    N_COUNTER_ROWS = ROWS(counter_rows),
    N_RECORD_ROWS = ROWS(record_rows),
    N_EVENT_ROWS = ROWS(event_rows),
    N_NEIGHBOUR_ROWS = ROWS(neighbour_rows),
    N_HOST_ROWS = ROWS(host_rows),
    N_STEP_ROWS = ROWS(step_rows),
    N_TRACE_ROWS = ROWS(trace_rows),
    N_TRACE_FILTER_ROWS = ROWS(trace_filter_rows),
};

#endif
