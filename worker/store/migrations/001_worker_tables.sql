create table users_sync_worker.lease (
    target text primary key,
    project text,
    epoch bigint not null default 0 check (epoch >= 0),
    writes bigint not null default 0 check (writes >= 0),
    sweep bigint not null default 0 check (sweep >= 0),
    holder text,
    quiet boolean not null default false,
    expires_at timestamptz not null default 'epoch'
);
comment on table users_sync_worker.lease is
    'Who may write to a target schema: one row each. epoch rises with every holder, writes with every writing transaction; sweep is the newest sweep''s number, project the Stack Auth project the target is bound to.';

create table users_sync_worker.checkpoint (
    target text primary key references users_sync_worker.lease (target),
    asked text not null,
    sweep bigint not null check (sweep > 0),
    last_millis bigint not null,
    last_id text not null,
    counts jsonb not null,
    started timestamptz not null,
    moved timestamptz not null
);
comment on table users_sync_worker.checkpoint is
    'How far an unfinished sweep has read: the key of the last user, written in the transaction that wrote the users up to it. asked says what was asked of which API.';

create table users_sync_worker.sweep (
    target text not null references users_sync_worker.lease (target),
    number bigint not null check (number > 0),
    kind text not null check (kind in ('sweep', 'audit', 'poll')),
    started timestamptz not null,
    finished timestamptz,
    outcome text check (outcome in ('complete', 'held', 'incomplete', 'failed', 'stopped')),
    pages bigint not null,
    users bigint not null,
    inserted bigint not null,
    updated bigint not null,
    restored bigint not null,
    deleted bigint not null,
    approved bigint not null,
    hidden bigint not null,
    stale bigint not null,
    quarantined bigint not null,
    held bigint not null,
    error text,
    primary key (target, number)
);
comment on table users_sync_worker.sweep is
    'What each sweep did, kept for 30 days. deleted counts what the guard let through, approved what a person did; finished and outcome are null while it is at work.';

create table users_sync_worker.deletion (
    target text not null references users_sync_worker.lease (target),
    user_id text not null,
    state text not null check (state in ('candidate', 'held', 'approved', 'hidden')),
    first_noticed bigint not null,
    last_noticed bigint not null,
    noticed_at timestamptz not null,
    asked_at timestamptz,
    primary key (target, user_id)
);
comment on table users_sync_worker.deletion is
    'Live rows whose user was missing from the list: suspected (candidate), proven but too many (held), approved by a person, or hidden from the list while the API still knows the user. first_noticed and last_noticed are numbers of sweeps.';

create table users_sync_worker.quarantine (
    target text not null references users_sync_worker.lease (target),
    record text not null,
    user_id text,
    digest text not null,
    payload text not null,
    error text not null,
    permanent boolean not null,
    first_seen timestamptz not null,
    last_seen timestamptz not null,
    times bigint not null check (times > 0),
    primary key (target, record)
);
comment on table users_sync_worker.quarantine is
    'Records that cannot be stored as they are. record is the user id, or the digest of a record without one; permanent ones are not tried again until they change.';
