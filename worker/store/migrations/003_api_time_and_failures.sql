alter table users_sync_worker.sweep
    add column unasked bigint not null default 0,
    add column api_seconds double precision,
    add column failures bigint not null default 0;
comment on column users_sync_worker.sweep.unasked is
    'Suspects about whom the API was not asked, because there were more than deletions.max_count: the next sweep asks about them first.';
comment on column users_sync_worker.sweep.api_seconds is
    'How long the API worked for it. The pause after it, and the age at which it is too old, follow from this: an outage is no work.';
comment on column users_sync_worker.sweep.failures is
    'How often it failed: one that goes on after a failure keeps its number.';

update users_sync_worker.sweep set failures = 1 where outcome in ('incomplete', 'failed');

create or replace view users_sync_worker.status as
select f.target, f.project,
       f.holder, f.at_work, f.quiet, f.held_since, f.lease_until, f.sweeping_since,
       f.last_complete, f.last_complete_age, f.longest_age,
       f.users_live, f.users_deleted,
       f.candidates, f.held, f.approved, f.hidden, f.quarantined,
       a.too_old is null and a.others = '{}' as healthy,
       a.too_old, a.others as other_reasons,
       coalesce(nullif(concat_ws('; ', a.too_old, nullif(array_to_string(a.others, '; '), '')), ''),
                'healthy') as verdict,
       f.failures, f.failing_since, f.last_error
from (
    select l.target, l.project, l.holder, l.quiet,
           l.expires_at > clock_timestamp() as at_work,
           case when l.expires_at > clock_timestamp() then l.acquired_at end as held_since,
           case when l.expires_at > clock_timestamp() then l.expires_at end as lease_until,
           (select s.started from users_sync_worker.sweep s
            where s.target = l.target and s.number = l.sweep and s.outcome is null
              and l.expires_at > clock_timestamp()) as sweeping_since,
           c.finished as last_complete,
           clock_timestamp() - c.finished as last_complete_age,
           case when not l.quiet then make_interval(secs => greatest(300, 3 * (c.seconds + greatest(
               coalesce(l.sweep_seconds, 60),
               c.seconds * (1 / coalesce(l.sweep_share, 0.25) - 1))))) end as longest_age,
           coalesce(e.failures, 0) as failures, e.failing_since, e.last_error,
           u.live as users_live, u.deleted as users_deleted,
           d.candidates, d.held, d.approved, d.hidden,
           (select count(*) from users_sync_worker.quarantine q
            where q.target = l.target) as quarantined
    from users_sync_worker.lease l
    cross join lateral users_sync_worker.count_users(l.target) u
    cross join lateral (
        select count(*) filter (where state = 'candidate') as candidates,
               count(*) filter (where state = 'held') as held,
               count(*) filter (where state = 'approved') as approved,
               count(*) filter (where state = 'hidden') as hidden
        from users_sync_worker.deletion where deletion.target = l.target
    ) d
    left join lateral (
        select s.finished,
               coalesce(s.api_seconds,
                        extract(epoch from s.finished - s.started)::double precision) as seconds
        from users_sync_worker.sweep s
        where s.target = l.target and s.outcome in ('complete', 'held')
        order by s.finished desc limit 1
    ) c on true
    left join lateral (
        select sum(s.failures)::bigint as failures, min(s.finished) as failing_since,
               (array_agg(s.error order by s.finished desc))[1] as last_error
        from users_sync_worker.sweep s
        where s.target = l.target and s.outcome in ('incomplete', 'failed')
          and s.finished > coalesce(c.finished, '-infinity')
    ) e on true
) f
left join lateral (
    -- By the catalog: to name a table takes the right to use its schema.
    select has_schema_privilege(n.oid, 'usage') and has_table_privilege(c.oid, 'select') as readable
    from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
    where n.nspname = f.target and c.relname = 'users_sync' and c.relkind in ('r', 'p')
) t on true
cross join lateral (
    select case when f.last_complete is null and not f.quiet then 'no sweep was completed yet'
                when f.last_complete_age > f.longest_age
                then format('the last complete sweep ended %s ago (longer than %s)',
                            date_trunc('second', f.last_complete_age),
                            date_trunc('second', f.longest_age)) end as too_old,
           array_remove(array[
               case when t.readable is null
                    then format('%I.users_sync does not exist: users-sync init', f.target)
                    when t.readable and f.users_live is null
                    then format('%I.users_sync lacks a column: users-sync check', f.target) end,
               case when f.failures > 1 then format('the last %s sweeps failed, since %s: %s',
                   f.failures, date_trunc('second', f.failing_since), f.last_error) end,
               case when f.held > 0 then format('%s held: users-sync deletions',
                   case f.held when 1 then '1 deletion is'
                   else f.held || ' deletions are' end) end,
               case when f.quarantined > 0 then format('%s in quarantine: users-sync quarantine',
                   case f.quarantined when 1 then '1 record is'
                   else f.quarantined || ' records are' end) end
           ], null) as others
) a;
comment on view users_sync_worker.status is
    'What `users-sync status` tells, a row for each target, as in: select healthy, verdict from users_sync_worker.status. Whoever may not read users_sync finds no counts of users.';
