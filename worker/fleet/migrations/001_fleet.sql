create table users_sync_fleet.project (
    name text primary key check (name ~ '^[a-z0-9][a-z0-9._-]{0,62}$'),
    api_url text not null,
    api_host text not null,
    project_id text not null,
    secret_ref text not null check (secret_ref ~ '^(env|file):[A-Za-z0-9_][A-Za-z0-9_.-]*$'),
    database_ref text not null check (database_ref ~ '^(env|file):[A-Za-z0-9_][A-Za-z0-9_.-]*$'),
    schema text not null,
    webhook_ref text check (webhook_ref ~ '^(env|file):[A-Za-z0-9_][A-Za-z0-9_.-]*$'),
    settings jsonb not null default '{}',
    enabled boolean not null default true,
    revision bigint not null default 1,
    created_at timestamptz not null default now(),
    constraint one_project_a_table unique (database_ref, schema)
);
comment on table users_sync_fleet.project is
    'Which projects are synced, and where to. Secrets stand here by reference only.';
create index project_host on users_sync_fleet.project (api_host) where enabled;

create table users_sync_fleet.visit (
    name text primary key references users_sync_fleet.project on delete cascade,
    visitor text,
    began_at timestamptz,
    ended_at timestamptz,
    outcome text check (outcome in ('done', 'cut', 'stopped', 'standing by', 'failed')),
    error text,
    fatal boolean not null default false,
    failures int not null default 0,
    failing_since timestamptz,
    fresh_at timestamptz,
    swept_at timestamptz,
    users bigint,
    held int not null default 0,
    candidates int not null default 0,
    quarantined int not null default 0,
    requests real not null default 1,
    seconds real not null default 0,
    database_host text,
    hinted_at timestamptz
) with (fillfactor = 50);
comment on table users_sync_fleet.visit is
    'What the last visit of each project found, and who visits it now. `fresh_at`: sign-ups until'
    ' then are rows. `requests` and `seconds` are running means of visits that ended well.';
create index visit_under_way on users_sync_fleet.visit (name) where visitor is not null;

create table users_sync_fleet.host (
    api_host text primary key,
    next_at timestamptz not null default 'epoch',
    projects int not null default 0,
    cycle_seconds double precision not null default 0
) with (fillfactor = 20);
comment on table users_sync_fleet.host is
    'One row an API host: the next free moment for a request, and how long it takes to visit all'
    ' of its projects once within the budget.';

create table users_sync_fleet.worker (
    name text primary key,
    machine text not null,
    version text not null,
    started_at timestamptz not null default clock_timestamp(),
    seen_at timestamptz not null default clock_timestamp(),
    projects int not null default 0,
    mirror_bytes bigint not null default 0
);
comment on table users_sync_fleet.worker is 'Who works for the fleet, and was seen when.';

create table users_sync_fleet.dead_worker (
    name text primary key,
    noticed_at timestamptz not null default clock_timestamp()
);
comment on table users_sync_fleet.dead_worker is
    'Which workers fell silent within a day: nobody waits for the leases that they held.';

create table users_sync_fleet.roster (
    only_one boolean primary key default true check (only_one),
    ran_at timestamptz not null default 'epoch'
);
comment on table users_sync_fleet.roster is 'When missing visits were last looked for.';
insert into users_sync_fleet.roster default values;

-- The engine looks at every job that waits to find one that is due. With these it does not.
create index if not exists users_sync_fleet_jobs_due on procrastinate_jobs (scheduled_at)
where status = 'todo';
create index if not exists users_sync_fleet_jobs_lock on procrastinate_jobs (lock)
where status in ('todo', 'doing');

create function users_sync_fleet.defer(
    wanted text, queue text, at timestamptz, urgency int
) returns void language sql as $$
    insert into procrastinate_jobs
        (queue_name, task_name, priority, lock, queueing_lock, args, scheduled_at)
    values (queue, 'visit', urgency, wanted, wanted, jsonb_build_object('project', wanted), at)
    on conflict (queueing_lock) where status = 'todo' do nothing
$$;
comment on function users_sync_fleet.defer is
    'Defer the next visit of a project, unless one waits already.';

create function users_sync_fleet.soon(wanted text) returns void language sql as $$
    update procrastinate_jobs set scheduled_at = clock_timestamp()
    where queueing_lock = wanted and status = 'todo' and scheduled_at > clock_timestamp();
    select users_sync_fleet.defer(wanted, 'visits', clock_timestamp(), 0);
$$;
comment on function users_sync_fleet.soon is
    'Have a project visited now that was added or changed, whatever pause it was in.';

create function users_sync_fleet.begin_visit(
    wanted text, worker text, queue text, most_of_host int, most_of_database int
) returns table (state text, revision bigint, hinted boolean, failed int) language plpgsql as $$
declare
    p users_sync_fleet.project;
    v users_sync_fleet.visit;
    of_host bigint;
    of_database bigint;
begin
    select * into p from users_sync_fleet.project where name = wanted and enabled;
    if not found then
        return query select 'gone', 0::bigint, false, 0;
        return;
    end if;
    -- Always in this order: all that begin a visit to one host come one after another.
    perform pg_advisory_xact_lock(1970365811, hashtext(p.api_host));
    select * into v from users_sync_fleet.visit where name = wanted;
    if v.database_host is not null then
        perform pg_advisory_xact_lock(1970365812, hashtext(v.database_host));
    end if;
    -- From the few visits under way: from the projects of a host it would take longer with each.
    with under_way as materialized (
        select o.name, o.database_host from users_sync_fleet.visit o
        where o.visitor is not null and o.name <> wanted
    )
    select count(*) filter (where (
               select op.api_host from users_sync_fleet.project op where op.name = u.name
           ) = p.api_host),
           count(*) filter (where u.database_host = v.database_host)
    into of_host, of_database from under_way u;
    if of_host >= most_of_host or of_database >= most_of_database or exists (
        select from users_sync_fleet.worker w where w.name = v.visitor and w.name <> worker
    ) then
        perform users_sync_fleet.defer(
            wanted, queue, clock_timestamp() + make_interval(secs => 1 + random()), 0
        );
        return query select 'busy', 0::bigint, false, 0;
        return;
    end if;
    update users_sync_fleet.visit set visitor = worker, began_at = clock_timestamp()
    where name = wanted;
    return query select 'begun', p.revision, v.hinted_at is not null, v.failures;
end
$$;
comment on function users_sync_fleet.begin_visit is
    'Begin a visit, unless the project is gone or paused, or its API or database is busy.';

create function users_sync_fleet.end_visit(
    wanted text, worker text, queue text, pause double precision, seen jsonb
) returns void language plpgsql as $$
declare
    v users_sync_fleet.visit;
    result text := seen->>'outcome';
    ended timestamptz := clock_timestamp();
    next_at timestamptz;
    urgency int := 0;
begin
    update users_sync_fleet.visit o set
        visitor = null,
        ended_at = ended,
        outcome = result,
        error = seen->>'error',
        fatal = coalesce((seen->>'fatal')::boolean, false),
        failures = case when result = 'failed' then failures + 1
                        when result = 'stopped' then failures else 0 end,
        failing_since = case when result = 'failed' then coalesce(failing_since, ended)
                             when result = 'stopped' then failing_since end,
        fresh_at = case when (seen->>'fresh')::boolean then began_at else fresh_at end,
        swept_at = coalesce(ended - make_interval(secs => (seen->>'swept_ago')::float8), swept_at),
        users = coalesce((seen->>'users')::bigint, users),
        held = coalesce((seen->>'held')::int, held),
        candidates = coalesce((seen->>'candidates')::int, candidates),
        quarantined = coalesce((seen->>'quarantined')::int, quarantined),
        requests = case when result = 'done'
            then 0.8 * requests + 0.2 * (seen->>'requests')::real else requests end,
        seconds = case when result = 'done'
            then 0.8 * seconds + 0.2 * extract(epoch from ended - began_at)::real
            else seconds end,
        database_host = coalesce(seen->>'database_host', database_host),
        hinted_at = case when (seen->>'hints_left')::boolean then ended
                         when result = 'done' and hinted_at <= began_at then null
                         else hinted_at end
    where name = wanted and visitor = worker
    returning * into v;
    if not found or not exists (
        select from users_sync_fleet.project p where p.name = wanted and p.enabled
    ) then
        return;
    end if;
    next_at := v.began_at + make_interval(secs => pause);
    if result = 'done' then
        next_at := greatest(next_at, v.began_at + make_interval(secs => (
            select coalesce(max(h.cycle_seconds), 0)
            from users_sync_fleet.project p join users_sync_fleet.host h using (api_host)
            where p.name = wanted
        )));
        if v.hinted_at is not null then
            next_at := ended + make_interval(
                secs => case when (seen->>'hints_left')::boolean then 1 else 0 end
            );
            urgency := 10;
        end if;
    elsif result = 'failed' or result = 'standing by' then
        next_at := ended + make_interval(secs => pause);
    end if;
    perform users_sync_fleet.defer(wanted, queue, greatest(next_at, ended), urgency);
end
$$;
comment on function users_sync_fleet.end_visit is
    'Note what a visit found, and defer the next one: after the pause, and no sooner than the'
    ' budget of its API allows; at once if it was hinted meanwhile.';

create function users_sync_fleet.hint(wanted text) returns void language sql as $$
    update users_sync_fleet.visit set hinted_at = clock_timestamp() where name = wanted;
    update procrastinate_jobs j set priority = 10, scheduled_at = clock_timestamp()
    where j.queueing_lock = wanted and j.status = 'todo'
      and not exists (
          select from users_sync_fleet.visit v where v.name = wanted and v.failures > 0
      );
$$;
comment on function users_sync_fleet.hint is
    'Have a project visited now, before all others; one that fails keeps to its pause.';

create function users_sync_fleet.claim(
    wanted_host text, wanted int, rate double precision, most_ahead double precision,
    out granted int, out first_at double precision, out now_at double precision
) language plpgsql as $$
begin
    insert into users_sync_fleet.host (api_host) values (wanted_host) on conflict do nothing;
    select extract(epoch from next_at) into first_at
    from users_sync_fleet.host where api_host = wanted_host for update;
    now_at := extract(epoch from clock_timestamp());
    -- What was not claimed is not saved up.
    first_at := greatest(first_at, now_at);
    granted := greatest(
        0, least(wanted, floor((most_ahead - (first_at - now_at)) * rate)::bigint + 1)
    );
    if granted > 0 then
        update users_sync_fleet.host set next_at = to_timestamp(first_at + granted / rate)
        where api_host = wanted_host;
    end if;
end
$$;
comment on function users_sync_fleet.claim is
    'Claim moments for requests to a host, `rate` a second: how many were granted, when the first'
    ' one is, and what time it is now, both in seconds of this clock. None is further ahead than'
    ' `most_ahead`.';

create function users_sync_fleet.tick(
    worker text, machine text, version text, projects int, mirror_bytes bigint,
    every double precision, silence double precision,
    out workers bigint, out enabled bigint, out looks boolean
) language plpgsql as $$
declare
    at timestamptz := clock_timestamp();
    silent_since timestamptz := at - make_interval(secs => silence);
begin
    insert into users_sync_fleet.worker as w (name, machine, version, projects, mirror_bytes)
    values (worker, machine, version, projects, mirror_bytes)
    on conflict (name) do update
        set seen_at = at, projects = excluded.projects, mirror_bytes = excluded.mirror_bytes;
    delete from users_sync_fleet.dead_worker d where d.name = worker;
    update users_sync_fleet.roster r set ran_at = at
    where r.ran_at < at - make_interval(secs => every)
       or r.ran_at < at - make_interval(secs => least(every, 1)) and (
           exists (select from users_sync_fleet.worker w where w.seen_at < silent_since)
           or exists (select from procrastinate_workers w where w.last_heartbeat < silent_since)
       );
    looks := found;
    select count(*) into workers from users_sync_fleet.worker;
    select coalesce(sum(h.projects), 0) into enabled from users_sync_fleet.host h;
end
$$;
comment on function users_sync_fleet.tick is
    'Tell that a worker is alive. `looks` says that it is the one to look after the roster now: when'
    ' nobody did for `every` seconds, and as soon as a worker was silent for `silence` seconds.'
    ' `enabled` is how many projects there were when somebody last looked.';

create function users_sync_fleet.look_after(
    silence double precision, lateness double precision, rate double precision, out deferred bigint
) language plpgsql as $$
begin
    with silent as (
        delete from users_sync_fleet.worker
        where seen_at < clock_timestamp() - make_interval(secs => silence)
        returning name
    )
    insert into users_sync_fleet.dead_worker (name) select name from silent
    on conflict do nothing;
    delete from users_sync_fleet.dead_worker
    where noticed_at < clock_timestamp() - interval '1 day';
    update users_sync_fleet.visit v set visitor = null
    where v.visitor is not null
      and not exists (select from users_sync_fleet.worker w where w.name = v.visitor);
    -- What waits for a worker that is gone, or that does not keep up, is for anybody.
    update procrastinate_jobs j set queue_name = 'visits'
    where j.task_name = 'visit' and j.status = 'todo' and j.queue_name <> 'visits'
      and (j.scheduled_at < clock_timestamp() - make_interval(secs => lateness)
           or not exists (
               select from users_sync_fleet.worker w where 'visits:' || w.name = j.queue_name
           ));
    delete from procrastinate_jobs j
    where j.task_name = 'visit' and j.status = 'todo'
      and not exists (
          select from users_sync_fleet.project p where p.name = j.lock and p.enabled
      );
    insert into procrastinate_jobs
        (queue_name, task_name, lock, queueing_lock, args, scheduled_at)
    select 'visits', 'visit', p.name, p.name, jsonb_build_object('project', p.name),
           clock_timestamp()
    from users_sync_fleet.project p
    where p.enabled
      and not exists (
          select from procrastinate_jobs j where j.lock = p.name and j.status in ('todo', 'doing')
      )
    order by p.created_at, p.name
    on conflict (queueing_lock) where status = 'todo' do nothing;
    get diagnostics deferred = row_count;
    -- One part in ten is left for hints, and for what fails and is asked again.
    insert into users_sync_fleet.host as h (api_host, projects, cycle_seconds)
    select p.api_host, count(*) filter (where p.enabled),
           coalesce(sum(v.requests) filter (where p.enabled), 0) / (0.9 * rate)
    from users_sync_fleet.project p join users_sync_fleet.visit v using (name)
    group by p.api_host
    on conflict (api_host) do update
        set projects = excluded.projects, cycle_seconds = excluded.cycle_seconds;
    delete from users_sync_fleet.host h
    where not exists (select from users_sync_fleet.project p where p.api_host = h.api_host)
      and h.next_at < clock_timestamp();
end
$$;
comment on function users_sync_fleet.look_after is
    'Look after the roster: forget workers that fell silent, hand on what waits for them, and defer'
    ' the visits that are missing; returns how many.';

create function users_sync_fleet.leave(leaving text) returns void language sql as $$
    delete from users_sync_fleet.worker where name = leaving;
    update users_sync_fleet.visit set visitor = null where visitor = leaving;
    update procrastinate_jobs set queue_name = 'visits'
    where queue_name = 'visits:' || leaving and status = 'todo';
$$;
comment on function users_sync_fleet.leave is 'Hand on what waits for a worker that stops.';

create view users_sync_fleet.status as
with seen as (
    select p.enabled, p.api_host, p.schema, v.*, h.cycle_seconds, clock_timestamp() as now,
        j.scheduled_at as next_visit_at
    from users_sync_fleet.project p
    join users_sync_fleet.visit v using (name)
    left join users_sync_fleet.host h on h.api_host = p.api_host
    left join procrastinate_jobs j on j.lock = p.name and j.status = 'todo'
)
select name,
    case when not enabled then 'paused'
        when failures > 0 and fatal then 'needs a person'
        when failures > 0 then 'failing'
        when held > 0 then 'held'
        when outcome = 'standing by' then 'standing by'
        when fresh_at is null or swept_at is null then 'new'
        when extract(epoch from now - fresh_at) > greatest(60, 3 * coalesce(cycle_seconds, 0))
        then 'late'
        else 'fresh'
    end as state,
    extract(epoch from now - fresh_at)::float8 as fresh_seconds,
    extract(epoch from now - swept_at)::float8 as swept_seconds,
    coalesce(cycle_seconds, 0) as cycle_seconds,
    visitor, next_visit_at, users, held, candidates, quarantined, failures, failing_since, error,
    nullif(concat_ws('; ',
        case when fatal and failures > 0 then error end,
        case when held > 0 then
            format('held deletions: %s (users-sync deletions --project %s)', held, name) end,
        case when quarantined > 0 then
            format('in quarantine: %s (users-sync quarantine --project %s)', quarantined, name) end
    ), '') as waits_for_a_person,
    api_host, schema, enabled
from seen;
comment on view users_sync_fleet.status is
    'How fresh each project is, who visits it, and what waits for a person. Seconds since sign-ups'
    ' were last looked at, and since the whole list was; null for never.';
