//! `pitr extract`: tables as they were, compared with what was there before they were dropped; and production as it is.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;
use walship_tests::postgres::{PgServer, majors, primary_major};
use walship_tests::process;
use walship_tests::stage::Stage;

/// Production, which goes on, and its archive.
struct Production {
    stage: Stage,
    server: PgServer,
}

const SCHEMA: &str = r#"
create type public.mood as enum ('sad', 'ok', 'happy');
create table public.customers (id int primary key, name text);
create sequence public.of_its_own;
create function public.touch() returns trigger language plpgsql as 'begin raise exception ''fired''; end';
create table public.orders (id serial primary key, customer int references public.customers, mood public.mood not null,
    total numeric(12,2) check (total >= 0), twice numeric generated always as (total * 2) stored,
    number int default nextval('public.of_its_own'), note text, at timestamptz default now(), unique (customer, note));
create index by_note on public.orders (lower(note)) where note is not null;
create table public.items (order_id int references public.orders on delete cascade, nr int, primary key (order_id, nr));
create statistics public.both on customer, mood from public.orders;
create trigger touched before update on public.orders for each row execute function public.touch();
create rule told as on delete to public.orders do also select 1;
alter table public.orders enable row level security;
create policy own on public.orders using (customer = 1);
comment on table public.orders is 'it''s "quoted"';
create table public."we""ird Name" ("Col; umn" text primary key, "b" bytea);
create table public.events (at date, what text) partition by range (at);
create table public.events_1 partition of public.events for values from ('2026-01-01') to ('2026-02-01');
create schema "Other";
create table "Other".events_2 partition of public.events for values from ('2026-02-01') to ('2026-03-01');
create view public.many as select count(*) from public.orders;
create unlogged table public.fleeting (id int);
"#;

impl Production {
    fn make(major: u32) -> Self {
        let stage = Stage::folder("main");
        let builder = stage.archiving(PgServer::builder(major).wal_segment_size_mb(1));
        let builder = builder.hba_line("host all carol 127.0.0.1/32 scram-sha-256");
        let server = builder.setting("autovacuum", "off").start();
        stage.init(&server);
        server.psql("create database shop");
        server.psql("create database attic");
        server.psql("create role carol login password 'hunter2'; grant create on database shop to carol");
        let production = Self { stage, server };
        production.psql("shop", SCHEMA);
        production.psql(
            "shop",
            "insert into customers select g, 'c' || g from generate_series(1, 50) g; \
             insert into orders (customer, mood, total, note) select 1 + g % 50, 'ok', g / 7.0, \
                 case when g % 5 > 0 then 'n''' || g || E'\\n\\t\\\\' end from generate_series(1, 500) g",
        );
        production.psql("attic", "create table public.customers (id int)");
        production.stage.backup(&production.server);
        production.psql(
            "shop",
            "insert into orders (customer, mood, total) values (3, 'happy', 1.5); delete from orders where id = 7; \
             insert into items values (3, 1), (3, 2), (4, 1); \
             insert into \"we\"\"ird Name\" values ('a''b', '\\x00ff'), (E'\\\\', null); \
             insert into events values ('2026-01-05', 'x'), ('2026-02-05', 'y'), ('2026-02-06', null)",
        );
        production
    }

    fn psql(&self, database: &str, sql: &str) -> String {
        let mut psql = self.server.binaries().tool("psql");
        psql.env("PGHOST", self.server.socket_dir()).env("PGPORT", self.server.port().to_string());
        let arguments = ["-XqAt", "-v", "ON_ERROR_STOP=1", "-U", "postgres", "-d", database, "-c", sql];
        process::run_ok(psql.args(arguments)).trim_end().to_owned()
    }

    /// Every row of a table, in the server's own text form.
    fn rows(&self, database: &str, table: &str) -> String {
        self.psql(database, &format!("select t::text from {table} t order by 1"))
    }

    /// All of a database but the schemas that extracts arrive in, as `pg_dump` tells it.
    fn dump(&self, database: &str) -> String {
        let mut dump = self.server.binaries().tool("pg_dump");
        dump.env("PGHOST", self.server.socket_dir()).env("PGPORT", self.server.port().to_string());
        let text =
            process::run_ok(dump.args(["-U", "postgres", "-N", "pitr_extract*", "-N", "back*", database]));
        // Each dump has another one.
        text.lines().filter(|line| !line.contains("restrict ")).collect::<Vec<_>>().join("\n")
    }

    fn extract(&self, words: &[&str]) -> Command {
        let mut extract = self.stage.pitr_as_user(&["extract", "--scratch"]);
        extract.arg(self.scratch()).arg("--pg-bin").arg(self.server.binaries().server_bin()).args(words);
        extract
    }

    fn json(&self, words: &[&str]) -> Value {
        let printed = self.stage.ok(self.extract(words).arg("--json"));
        serde_json::from_str(&printed).unwrap_or_else(|error| panic!("{error}: {printed}"))
    }

    fn scratch(&self) -> PathBuf {
        self.stage.path().join("scratch")
    }

    fn conninfo(&self, database: &str) -> String {
        format!(
            "host={} port={} user=postgres dbname={database}",
            self.server.socket_dir().display(),
            self.server.port()
        )
    }

    fn schemas(&self, database: &str) -> String {
        self.psql(
            database,
            "select string_agg(nspname, ' ' order by nspname) from pg_namespace where nspname !~ '^pg_(cat|toa|temp)' \
             and nspname <> 'information_schema'",
        )
    }
}

#[test]
fn a_dropped_table_comes_back_as_it_was() {
    for major in majors() {
        let production = Production::make(major);
        let (orders, items) = (production.rows("shop", "orders"), production.rows("shop", "items"));
        let sequence: u64 = production.psql("shop", "select last_value from orders_id_seq").parse().unwrap();
        production.psql("shop", "drop table public.items, public.orders cascade");
        production.psql("shop", "insert into customers values (1000, 'since then')");
        production.server.archive_now();
        let before = production.dump("shop");

        // The command of the night, but for where this test has its server.
        let into = production.conninfo("shop");
        let words = ["--table", "public.orders", "--before", "drop:public.orders", "--into", &into];
        let said = production.stage.ok(&mut production.extract(&words));
        let schemas = production.schemas("shop");
        let schema = schemas.split(' ').find(|name| name.starts_with("pitr_extract_2")).unwrap();
        assert_eq!(production.rows("shop", &format!("{schema}.orders")), orders);
        assert_eq!(production.dump("shop"), before, "what was there is as it was");
        assert!(!production.scratch().exists());
        for words in [
            "Delivered to ",
            "from database shop",
            "500 rows -> ",
            "foreign key orders_customer_fkey of public.orders to public.customers",
            "trigger touched of public.orders",
            "policy own of public.orders",
            "rule told of public.orders",
            "statistics both of public.orders",
            "row level security of public.orders",
            "SET SCHEMA \"public\"",
        ] {
            assert!(said.contains(words), "{words}: {said}");
        }
        // What comes along.
        let of = |sql: &str| production.psql("shop", &sql.replace("SCHEMA", schema));
        // WAL tells of a sequence up to 32 numbers ahead, as after any recovery.
        let arrived: u64 = of("select last_value from SCHEMA.orders_id_seq").parse().unwrap();
        assert!((sequence..=sequence + 32).contains(&arrived), "{sequence} {arrived}");
        assert_eq!(
            of(
                "select count(*) from pg_constraint where conrelid = 'SCHEMA.orders'::regclass and contype in ('p', 'u', 'c')"
            ),
            "3"
        );
        assert_eq!(of("select count(*) from pg_indexes where schemaname = 'SCHEMA'"), "3");
        assert_eq!(of("select obj_description('SCHEMA.orders'::regclass)"), "it's \"quoted\"");
        assert_eq!(
            of("insert into SCHEMA.orders (customer, mood, total) values (1, 'sad', 2) returning twice"),
            "4.00"
        );
        // The next step that is said works.
        of("alter table SCHEMA.orders set schema public");

        // Two together keep what binds them; a name is given; all of it by its number.
        let xid = production.psql("shop", "select xmin from customers where id = 1000");
        let words = [
            "--table",
            "orders",
            "--table",
            "public.items",
            "--before-xid",
            &xid,
            "--into",
            &into,
            "--into-schema",
            "back \"again",
        ];
        // The drop was before that transaction: they are not there any more.
        let said = production.stage.fails(&mut production.extract(&words), 1);
        assert!(said.contains("is in no database") && said.contains("shop: no table orders"), "{said}");
        let words = ["--table", "orders", "--table", "public.items", "--before", "drop:shop/public.orders"];
        let words = [&words[..], &["--into", &into, "--into-schema", "back \"again"]].concat();
        let report = production.json(&words);
        assert_eq!(report["database"], "shop");
        assert_eq!(production.rows("shop", "\"back \"\"again\".items"), items);
        assert_eq!(production.rows("shop", "\"back \"\"again\".orders"), orders);
        let keys = "select count(*) from pg_constraint where contype = 'f' and conrelid = '\"back \"\"again\".items'::regclass";
        assert_eq!(production.psql("shop", keys), "1");
        let said = production.stage.fails(&mut production.extract(&words), 2);
        assert!(said.contains("is there already") && said.contains("nothing was started"), "{said}");
        assert!(!production.scratch().exists());

        assert_eq!(production.stage.holds(), [], "none outlives what made it, whatever came of that");
        let history = production.stage.ok(&mut production.stage.pitr(&["history", "--only", "extract"]));
        for words in
            ["extract  delivered", "extract  failed", "what: table public.orders of database shop, into "]
        {
            assert!(history.contains(words), "{words}: {history}");
        }
    }
}

/// The archive knows no name of it: what was restored tells whether the drop was the one that is meant.
#[test]
fn a_table_made_after_the_last_backup_comes_back_by_one_command() {
    for major in majors() {
        let production = Production::make(major);
        production.psql(
            "shop",
            "create table fresh (id serial primary key, note text); insert into fresh (note) select 'n' || g from generate_series(1, 10) g",
        );
        let fresh = production.rows("shop", "fresh");
        production.psql("shop", "drop table fresh; insert into customers values (1000, 'since then')");
        production.server.archive_now();
        let before = production.dump("shop");
        let into = production.conninfo("shop");
        let words = ["--table", "public.fresh", "--before", "drop:public.fresh", "--into", &into];
        let output = production.stage.run(&mut production.extract(&words));
        let said = String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{said}");
        for words in [
            "it has no name in the archive",
            "10 rows -> ",
            "in database shop, and its storage (1663/",
            "is what the drop removed",
        ] {
            assert!(said.contains(words), "{words}: {said}");
        }
        let schemas = production.schemas("shop");
        let schema = schemas.split(' ').find(|name| name.starts_with("pitr_extract_2")).unwrap();
        assert_eq!(production.rows("shop", &format!("{schema}.fresh")), fresh);
        assert_eq!(production.dump("shop"), before);

        // Partitions have the storage that their table has not; what was dropped elsewhere is not asked for.
        production.psql(
            "attic",
            "create table parts (id int, of int) partition by list (of); create table parts_1 partition of parts for values in (1); \
             create table parts_2 partition of parts for values in (2); create table kept (id int); insert into kept values (7); \
             insert into parts select g, 1 + g % 2 from generate_series(1, 9) g",
        );
        let parts = production.rows("attic", "parts");
        production.psql("attic", "drop table parts");
        production.server.archive_now();
        // Each arrives in a schema of its own: to drop one were a drop without a name as well.
        let extract = |table: &str, before: &str| {
            let schema = format!("back_{table}");
            let words = ["--table", table, "--before", before, "--into", &into, "--into-schema", &schema];
            production.extract(&words)
        };
        production.stage.ok(&mut extract("parts", "drop:attic/public.parts"));
        assert_eq!(production.rows("shop", "back_parts.parts"), parts);

        // The only drop that may be meant was another's: nothing is delivered, and it is said which there is.
        let schemas = production.schemas("shop");
        let refused = |before: &str, why: &str| {
            let said = production.stage.fails(&mut extract("kept", before), 3);
            assert!(said.contains("may be") && said.contains(why) && said.contains("--to-lsn "), "{said}");
            assert_eq!(production.schemas("shop"), schemas);
            assert!(!production.scratch().exists());
            said
        };
        refused("drop:attic/public.never", "there is no such table in database attic");
        refused("drop:attic/public.kept", "other storage than what it removed");
        // Two may be it: which one, nobody guesses.
        production.psql("shop", "create table fresh (id int); drop table fresh");
        production.server.archive_now();
        let said = production.stage.fails(&mut extract("fresh", "drop:shop/public.fresh"), 3);
        assert!(said.contains("some without a name may be") && !said.contains("recovered to"), "{said}");
        assert_eq!(said.matches(" --exclusive   (").count(), 2, "{said}");
        // In a database that is new as well it was emptied, by the transaction that dropped another.
        production.server.psql("create database shelf");
        production.psql(
            "shelf",
            "create table kept (id int); insert into kept values (1); create table gone (id int)",
        );
        production.psql("shelf", "begin; truncate kept; drop table gone; commit");
        production.server.archive_now();
        let oid = production.psql("shelf", "select oid from pg_database where datname = 'shelf'");
        if major >= 15 {
            refused(&format!("drop:{oid}/public.kept"), "got new storage by it, and was not dropped");
        }
        production.stage.ok(&mut extract("gone", &format!("drop:{oid}/public.gone")));
        assert_eq!(production.stage.holds(), []);

        // A plan and a restore are refused where an extract looks for itself.
        let said = production
            .stage
            .fails(&mut production.stage.pitr(&["plan", "--before", "drop:attic/public.parts"]), 3);
        assert!(said.contains("some without a name may be"), "{said}");
        // A name that the backup knows, made anew since: the last of them is the one.
        production.psql(
            "attic",
            "drop table customers; create table customers (id int); insert into customers values (5)",
        );
        let again = production.rows("attic", "customers");
        production.psql("attic", "drop table customers");
        production.server.archive_now();
        production.stage.ok(&mut extract("customers", "drop:attic/public.customers"));
        assert_eq!(production.rows("shop", "back_customers.customers"), again);
    }
}

#[test]
fn names_partitions_and_whole_schemas_come_back() {
    let production = Production::make(primary_major());
    let tables = [
        "public.\"we\"\"ird Name\"",
        "public.events",
        "public.events_1",
        "\"Other\".events_2",
        "public.orders",
    ];
    let rows: Vec<String> = tables.iter().map(|table| production.rows("shop", table)).collect();
    production.psql(
        "shop",
        "select pg_create_restore_point('here'); drop schema \"Other\" cascade; drop table events",
    );
    production.server.archive_now();
    let into = production.conninfo("attic");
    // Into another database, of which nothing is asked.
    let words =
        ["--table", "public.we\"ird Name", "--to-name", "here", "--into", &into, "--into-schema", "back1"];
    production.json(&words);
    assert_eq!(production.rows("attic", "back1.\"we\"\"ird Name\""), rows[0]);
    // A partitioned table, its partitions in two schemas: one for each.
    let words = ["--table", "events", "--to-name", "here", "--into", &into, "--into-schema", "back2"];
    let report = production.json(&words);
    assert_eq!(production.schemas("attic"), "back1 back2_Other back2_public public");
    assert_eq!(production.rows("attic", "back2_public.events"), rows[1]);
    let own: Vec<_> =
        report["tables"].as_array().unwrap().iter().map(|table| table["rows"].clone()).collect();
    assert_eq!(own, [Value::from(2), Value::Null, Value::from(1)]);
    // One partition stands alone.
    let words = ["--table", "Other.events_2", "--to-name", "here", "--into", &into, "--into-schema", "back3"];
    let report = production.json(&words);
    assert_eq!(production.rows("attic", "back3.events_2"), rows[3]);
    assert!(report["left_out"].to_string().contains("is a part of public.events"), "{report:#}");
    // A whole schema brings its types, sequences and views along.
    let words = ["--schema", "public", "--dbname", "shop", "--to-name", "here", "--into", &into];
    let report = production.json(&[&words[..], &["--into-schema", "back4"]].concat());
    assert_eq!(production.rows("attic", "back4_public.orders"), rows[4]);
    assert_eq!(production.rows("attic", "back4_public.many"), "(500)");
    let type_of = "select format_type(atttypid, null) from pg_attribute where attrelid = 'back4_public.orders'::regclass \
                   and attname = 'mood'";
    assert_eq!(production.psql("attic", type_of), "back4_public.mood");
    assert!(report["left_out"].to_string().contains("1 functions of schema public"), "{report:#}");
    assert!(report["notes"].to_string().contains("unlogged"), "{report:#}");
    // And so does a database.
    let words =
        ["--database", "--dbname", "shop", "--to-name", "here", "--into", &into, "--into-schema", "back5"];
    production.json(&words);
    assert_eq!(production.rows("attic", "back5_public.events"), rows[1]);
    assert!(!production.scratch().exists());
}

#[test]
fn files_hold_what_was_there_and_overwrite_none() {
    let production = Production::make(primary_major());
    let orders = production.rows("shop", "orders");
    production.psql("shop", "select pg_create_restore_point('here'); drop table orders cascade");
    production.server.archive_now();
    let file = |name: &str| production.stage.path().join(name).to_str().unwrap().to_owned();
    let tool = |name: &str| {
        let mut tool = production.server.binaries().tool(name);
        tool.env("PGHOST", production.server.socket_dir())
            .env("PGPORT", production.server.port().to_string());
        tool.env("PGUSER", "postgres");
        tool
    };
    // The whole database as custom, into a new one.
    let dump = file("shop.dump");
    let words = ["--database", "--dbname", "shop", "--to-name", "here", "--output", &dump];
    let report = production.json(&words);
    assert_eq!(report["file"]["form"], "custom");
    assert_eq!(report["file"]["bytes"], fs::metadata(&dump).unwrap().len());
    production.server.psql("create database again");
    process::run_ok(tool("pg_restore").args(["--exit-on-error", "-d", "again", &dump]));
    assert_eq!(production.rows("again", "orders"), orders);
    // A table as SQL: triggers, policies and all.
    let sql = file("orders.sql");
    let words = ["--table", "public.orders", "--to-name", "here", "--output", &sql];
    production.json(&words);
    let text = fs::read_to_string(&sql).unwrap();
    for words in ["CREATE TRIGGER touched", "CREATE POLICY own", "COPY public.orders"] {
        assert!(text.contains(words), "{words}");
    }
    process::run_ok(tool("psql").args(["-Xq", "-1", "-v", "ON_ERROR_STOP=1", "-d", "shop", "-f", &sql]));
    assert_eq!(production.rows("shop", "orders"), orders);
    // The same as custom, by name.
    let words = ["--schema", "Other", "--to-name", "here", "--output", &file("x.sql"), "--format", "custom"];
    production.json(&words);
    assert!(fs::read(file("x.sql")).unwrap().starts_with(b"PGDMP"));
    // What is there stays.
    for words in [
        ["--table", "public.orders", "--to-name", "here", "--output", &sql],
        ["--table", "public.orders", "--to-name", "here", "--output", &file("no/such/folder.sql")],
    ] {
        let said = production.stage.fails(&mut production.extract(&words), 2);
        assert!(said.contains("nothing was written"), "{said}");
    }
    assert_eq!(fs::read_to_string(&sql).unwrap(), text);
    assert!(!production.scratch().exists());
}

#[test]
fn what_cannot_arrive_leaves_nothing_behind() {
    let production = Production::make(primary_major());
    production
        .psql("shop", "select pg_create_restore_point('here'); drop table orders cascade; drop type mood");
    production.server.archive_now();
    let schemas = production.schemas("shop");
    let into = production.conninfo("shop");
    let fails = |words: &[&str], status: i32| {
        let said = production.stage.fails(&mut production.extract(words), status);
        assert_eq!(production.schemas("shop"), schemas, "{said}");
        assert!(!production.scratch().exists());
        said
    };
    // The type is gone: the first table arrives, the second does not, and so neither does.
    let words = [
        "--table",
        "customers",
        "--table",
        "orders",
        "--dbname",
        "shop",
        "--to-name",
        "here",
        "--into",
        &into,
    ];
    let said = fails(&words, 1);
    assert!(said.contains("took nothing") && said.contains("mood") && said.contains("rolled back"), "{said}");
    // Two databases have it.
    let said = fails(&["--table", "customers", "--to-name", "here", "--into", &into], 2);
    assert!(said.contains("several databases: attic, shop") && said.contains("--dbname"), "{said}");
    let said = fails(&["--table", "orders", "--dbname", "nowhere", "--to-name", "here", "--into", &into], 1);
    assert!(said.contains("no database \"nowhere\""), "{said}");
    let said = fails(&["--schema", "gone", "--to-name", "here", "--into", &into], 1);
    assert!(said.contains("no such schema"), "{said}");
    // A password is refused before it is used, and not repeated.
    let secret = format!("{into} password=hunter2");
    let said = fails(&["--table", "orders", "--to-name", "here", "--into", &secret], 2);
    assert!(said.contains("holds a password") && !said.contains("hunter2"), "{said}");
    // A server that is not there is known before anything is restored.
    let said = fails(&["--table", "orders", "--to-name", "here", "--into", "host=/nowhere"], 1);
    assert!(said.contains("connecting to the server of --into"), "{said}");
    // Each is on record, also what was refused before anything was restored; and what was only looked up is not.
    let said = fails(&["--table", "orders", "--to-name", "nowhere", "--into", &into], 3);
    assert!(said.contains("nowhere"), "{said}");
    let printed =
        production.stage.ok(&mut production.stage.pitr(&["history", "--json", "--only", "extract"]));
    assert!(!printed.contains("hunter2"), "{printed}");
    let printed: Value = serde_json::from_str(&printed).unwrap();
    let entries = printed["entries"].as_array().unwrap();
    let outcomes: Vec<_> = entries.iter().rev().map(|entry| entry["outcome"].as_str().unwrap()).collect();
    assert_eq!(
        outcomes,
        ["failed", "failed", "failed", "failed", "refused", "refused", "refused"],
        "{printed:#}"
    );
    assert!(entries.iter().all(|entry| entry["problems"].as_array().unwrap().len() == 1), "{printed:#}");
    assert_eq!(entries[0]["target"], "--to-name nowhere");
    assert_eq!((&entries[0]["backup"], &entries[1]["backup"]), (&Value::Null, &Value::Null));
    // Who may make no schema is told so, and who may gets in by the variable.
    let by_carol = |database: &str| {
        let server = format!("host=127.0.0.1 port={} user=carol dbname={database}", production.server.port());
        let words = [
            "--table",
            "public.we\"ird Name",
            "--to-name",
            "here",
            "--into",
            &server,
            "--into-schema",
            "back",
        ];
        let mut extract = production.extract(&words);
        extract.env("PGPASSWORD", "hunter2");
        extract
    };
    let said = production.stage.fails(&mut by_carol("attic"), 1);
    assert!(said.contains("carol may make no schema"), "{said}");
    let said = production.stage.ok(&mut by_carol("shop"));
    assert!(!said.contains("hunter2"));
    assert_eq!(production.psql("shop", "select count(*) from back.\"we\"\"ird Name\""), "2");
    assert_eq!(
        production.psql("shop", "select nspowner::regrole from pg_namespace where nspname = 'back'"),
        "carol"
    );
}
