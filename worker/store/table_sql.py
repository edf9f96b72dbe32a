"""The SQL about users_sync, as templates: names and expressions are put in for each shape of it."""

# Exact to the year 9999; what lies beyond is read from the record itself, if that has it: a plain
# table may hold anything.
MILLIS = """
case when not isfinite({u}.created_at) then null
     when {u}.created_at >= '10000-01-01'
          and {u}.raw_json->>'signed_up_at_millis' ~ '^-?[0-9]{{1,18}}$'
     then ({u}.raw_json->>'signed_up_at_millis')::bigint
     else (extract(epoch from {u}.created_at) * 1000)::bigint end
"""

LOAD = """
select coalesce({millis}, {no_millis}) as millis, decode(replace(u.id::text, '-', ''), 'hex') as id
from {table} u
where u.deleted_at is null
  and u.id::text ~ '^[0-9a-f]{{8}}-[0-9a-f]{{4}}-[0-9a-f]{{4}}-[0-9a-f]{{4}}-[0-9a-f]{{12}}$'
  and {these}
order by millis, id
"""

THESE = "u.id = any(%(ids)s::{id_type}[])"

# What an answer says of these users, and those of them who have a row. The records come in one
# parameter: `copy` into a temporary table takes as long for new users, and another round trip.
COMPARED = """
with incoming as materialized (
    select position, record, (record->>'id')::{id_type} as id,
           (record->>'signed_up_at_millis')::bigint as millis
    from jsonb_array_elements(%(records)s::jsonb) with ordinality as r (record, position)
), old as materialized (
    select i.*, u.deleted_at is not null as was_deleted,
           u.deleted_at is null and not ({differs}) as same, {millis} as old_millis
    from incoming i join {table} u on u.id = i.id
)"""

# Not `on conflict do update`, which would lock the unchanged rows, too. After waiting for a lock
# Postgres looks at `where` again, with the new row `u` but the old `i`: hence `differs` once more.
CHANGED = """, changed as (
    update {table} u
    set {assignments}, updated_at = clock_timestamp(), deleted_at = null
    from old i
    where u.id = i.id and not i.same
      and ({differs} or u.deleted_at is not null)
      and {answer_not_older}
    returning u.id
)"""

ADDED = """, added as (
    insert into {table} ({columns}, updated_at, deleted_at)
    select {values}, null, null
    from incoming i where not exists (select from old o where o.position = i.position)
    on conflict (id) do nothing
    returning id
)"""

# Without the records: sorting those would take longer than all the rest here.
LETTERS = """, letters as (
    select position, o.old_millis, i.millis,
           case when a.id is not null then 'i'
                when c.id is not null and o.was_deleted then 'r'
                when c.id is not null then 'u'
                when o.same then '='
                else 's' end as letter
    from incoming i left join old o using (position)
         left join changed c on c.id = i.id left join added a on a.id = i.id
)
"""

RETURNED = """
select coalesce(string_agg(letter, '' order by position), ''),
       (array_agg(position - 1 order by position) filter (where {moved}))[1:%(most_moved)s],
       (array_agg(coalesce(old_millis, {no_millis}) order by position)
        filter (where {moved}))[1:%(most_moved)s]"""

APPLY = f"{COMPARED}{CHANGED}{ADDED}{LETTERS}{RETURNED}\nfrom letters"

LETTERS_OF_ADDED = """
select coalesce(string_agg(
    case when a.id is not null then 'i' when o.same then '=' else 's' end, '' order by position),
    ''), null, null
from incoming i left join old o using (position) left join added a on a.id = i.id
"""

# For a table that refuses every update, also one that would find no row.
ADD = f"{COMPARED}{ADDED}{LETTERS_OF_ADDED}"

# A replica that lags may show a user for a while after the deletion: an answer that was asked for
# within grace_seconds of it restores no user. Times in the future are not believed.
ANSWER_NOT_OLDER = """
not coalesce(%(observed_at)s < u.updated_at and u.updated_at <= clock_timestamp(), false)
and not coalesce(
    u.deleted_at <= clock_timestamp()
    and %(observed_at)s <= u.deleted_at + make_interval(secs => %(grace_seconds)s), false)
"""

MOVED = "letter in ('u', 'r') and old_millis is distinct from millis"

PLAIN_VALUES = {
    "name": "i.record->>'display_name'",
    "email": "i.record->>'primary_email'",
    "created_at": (
        "to_timestamp(trunc((i.record->>'signed_up_at_millis')::bigint::double precision) / 1000)"
    ),
}

RECORD_DIFFERS = """
(case when jsonb_typeof(u.raw_json) = 'object' then u.raw_json - %(ignored)s::text[]
      else u.raw_json end) is distinct from i.record - %(ignored)s::text[]
"""

PROVEN = """
with proof as materialized (
    select position, id::{id_type} as id, observed_at
    from unnest(%(ids)s::text[], %(observed_at)s::timestamptz[]) with ordinality
        as p (id, observed_at, position)
)"""

MARKED = """, marked as (
    update {table} u set deleted_at = clock_timestamp()
    from proof p
    where u.id = p.id and u.deleted_at is null and not ({young}) and {proof_not_older} and {fresh}
    returning u.id
), counted as (
    update users_sync_worker.sweep
    set {counter} = {counter} + (select count(*) from marked)
    where target = %(target)s and number = %(sweep)s
)
select coalesce(string_agg(
    case when m.id is not null then 'd'
         when u.id is not null and u.deleted_at is null and ({young} or not {fresh}) then 'w'
         else 's' end, '' order by p.position), '')
from proof p left join marked m on m.id = p.id left join {table} u on u.id = p.id
"""

SOFT_DELETE = f"{PROVEN}{MARKED}"

# A user who was gone longer ago may be back since.
FRESH = "(p.observed_at > clock_timestamp() - make_interval(secs => %(proof_seconds)s))"

PROOF_NOT_OLDER = """
not coalesce(p.observed_at < u.updated_at and u.updated_at <= clock_timestamp(), false)
"""

# The list may come from a replica that lags. Times in the future are not believed.
YOUNG = """
coalesce(u.created_at > clock_timestamp() - make_interval(secs => %(grace_seconds)s)
         and u.created_at <= clock_timestamp(), false)
or coalesce(u.updated_at > clock_timestamp() - make_interval(secs => %(grace_seconds)s)
            and u.updated_at <= clock_timestamp(), false)
"""

# Locks the free rows, unchanged ones too, until this short transaction ends. The mode is that of
# our own updates, which a foreign key's lock does not block.
LOCKED = """
with free as materialized (
    select u.id from {table} u where {these} for no key update skip locked
)
select (array_agg(u.id::text))[1:%(most)s] from {table} u
where {these} and u.id not in (select id from free)
"""

STATE = "select deleted_at is null from {table} where id::text = %(id)s"

SAMPLE = """
select id::text from (
    select id, row_number() over (order by id) as at, count(*) over () as live
    from {table} u where deleted_at is null
      and id::text ~ '^[0-9a-f]{{8}}-[0-9a-f]{{4}}-[0-9a-f]{{4}}-[0-9a-f]{{4}}-[0-9a-f]{{12}}$'
) u
where (at - 1) %% greatest(1, (live + %(count)s - 1) / %(count)s) = 0
order by at
"""
