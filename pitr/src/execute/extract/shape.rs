//! Moves what is extracted into fresh schemas, in the scratch server: from there it is dumped under the names that it
//! is to arrive by, and stands alone.
//!
//! What would reach out of those schemas in the server that it arrives in, or act there, is left out and named.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use walship::replication::{Connection, Rows};
use walship::{Error, Result};

use super::{Found, Selection, Table};
use crate::execute::scratch::{Up, literal, quoted};

/// How long each statement may take.
const STATEMENT: Duration = Duration::from_secs(3600);

/// The longest name that PostgreSQL does not cut.
const NAME_BYTES_MAX: usize = 63;

/// How many things that were left out are named.
const LEFT_OUT_MAX: usize = 200;

/// What was made of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Shaped {
    /// What was left out, for people.
    pub left_out: Vec<String>,
}

/// Returns the schema that each schema's objects arrive in: one of the name that is given, or where there are
/// several one for each, with its name behind.
pub fn target_names(name: &str, schemas: &BTreeSet<String>) -> BTreeMap<String, String> {
    if schemas.len() == 1 {
        return schemas.iter().map(|schema| (schema.clone(), name.to_owned())).collect();
    }
    let mut taken = BTreeSet::new();
    let mut names = BTreeMap::new();
    for (number, schema) in schemas.iter().enumerate() {
        let mut target = cut(&format!("{name}_{schema}"), NAME_BYTES_MAX);
        if target.len() == NAME_BYTES_MAX || taken.contains(&target) {
            let end = format!("_{}", number + 1);
            target = cut(&target, NAME_BYTES_MAX - end.len()) + &end;
        }
        taken.insert(target.clone());
        names.insert(schema.clone(), target);
    }
    names
}

/// Cuts a text to so many bytes, between characters.
fn cut(text: &str, bytes: usize) -> String {
    let end = (0..=bytes.min(text.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    text[..end].to_owned()
}

/// Moves what was found into the fresh schemas, in one transaction.
///
/// # Errors
/// [`Error::Invalid`] when a schema of that name is there at the target; what the server says.
pub async fn shape(
    up: &Up,
    found: &Found,
    selection: &Selection,
    targets: &BTreeMap<String, String>,
) -> Result<Shaped> {
    let mut connection = up.connect(&found.database, STATEMENT).await?;
    let mut work = Work { connection: &mut connection, oids: oids(&found.tables), left_out: Vec::new() };
    work.run("BEGIN; SET LOCAL search_path = pg_catalog").await?;
    for target in targets.values() {
        let there = format!("SELECT FROM pg_namespace WHERE nspname = {}", literal(target));
        if !work.connection.query(&there).await?.rows.is_empty() {
            return Err(Error::invalid(format!("at the target there is a schema {target:?} already"))
                .with_next("Choose another name with --into-schema."));
        }
        work.run(&format!("CREATE SCHEMA {}", quoted(target))).await?;
    }
    if !found.tables.is_empty() {
        work.leave_parents().await?;
        work.leave_out().await?;
    }
    for table in &found.tables {
        let target = targets.get(&table.schema).map_or(&*table.schema, |target| target);
        work.run(&format!(
            "ALTER TABLE {}.{} SET SCHEMA {}",
            quoted(&table.schema),
            quoted(&table.name),
            quoted(target)
        ))
        .await?;
    }
    if !matches!(selection, Selection::Tables(_)) {
        for (schema, target) in targets {
            work.move_others(schema, target).await?;
        }
    }
    work.run("COMMIT").await?;
    let mut left_out = work.left_out;
    connection.close().await;
    if let Some(more) = left_out.len().checked_sub(LEFT_OUT_MAX).filter(|more| *more > 0) {
        left_out.truncate(LEFT_OUT_MAX);
        left_out.push(format!("and {more} more"));
    }
    Ok(Shaped { left_out })
}

fn oids(tables: &[Table]) -> String {
    let oids: Vec<String> = tables.iter().map(|table| table.oid.to_string()).collect();
    oids.join(", ")
}

/// The session in which all is moved.
struct Work<'a> {
    connection: &'a mut Connection,
    /// The oids of the tables.
    oids: String,
    left_out: Vec<String>,
}

impl Work<'_> {
    async fn run(&mut self, sql: &str) -> Result<Rows> {
        self.connection.query(sql).await
    }

    /// Parts tables from partitioned tables and parents that are not extracted.
    async fn leave_parents(&mut self) -> Result<()> {
        let oids = &self.oids;
        let sql = format!(
            "SELECT pn.nspname, p.relname, cn.nspname, c.relname, c.relispartition FROM pg_inherits i \
             JOIN pg_class p ON p.oid = i.inhparent JOIN pg_namespace pn ON pn.oid = p.relnamespace \
             JOIN pg_class c ON c.oid = i.inhrelid JOIN pg_namespace cn ON cn.oid = c.relnamespace \
             WHERE i.inhrelid IN ({oids}) AND i.inhparent NOT IN ({oids}) ORDER BY 1, 2, 3, 4"
        );
        for row in texts(self.run(&sql).await?) {
            let [parent_schema, parent, schema, name, is_partition] = &*row else { continue };
            let parent_name = format!("{}.{}", quoted(parent_schema), quoted(parent));
            let table = format!("{}.{}", quoted(schema), quoted(name));
            let sql = match is_partition == "t" {
                true => format!("ALTER TABLE {parent_name} DETACH PARTITION {table}"),
                false => format!("ALTER TABLE {table} NO INHERIT {parent_name}"),
            };
            self.run(&sql).await?;
            self.left_out.push(format!("that {schema}.{name} is a part of {parent_schema}.{parent}"));
        }
        Ok(())
    }

    /// Leaves out what would reach out of the fresh schemas or act there.
    async fn leave_out(&mut self) -> Result<()> {
        let oids = self.oids.clone();
        // Each: what it is called, the words before its name, and where it is: a table or nothing.
        let queries = [
            (
                "foreign key",
                format!(
                    "SELECT k.conname, n.nspname, c.relname, rn.nspname || '.' || r.relname FROM pg_constraint k \
                     JOIN pg_class c ON c.oid = k.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
                     JOIN pg_class r ON r.oid = k.confrelid JOIN pg_namespace rn ON rn.oid = r.relnamespace \
                     WHERE k.contype = 'f' AND k.conparentid = 0 AND k.conrelid IN ({oids}) \
                     AND k.confrelid NOT IN ({oids}) ORDER BY 2, 3, 1"
                ),
            ),
            (
                "trigger",
                format!(
                    "SELECT t.tgname, n.nspname, c.relname, '' FROM pg_trigger t \
                     JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
                     WHERE NOT t.tgisinternal AND t.tgparentid = 0 AND t.tgrelid IN ({oids}) ORDER BY 2, 3, 1"
                ),
            ),
            (
                "policy",
                format!(
                    "SELECT p.polname, n.nspname, c.relname, '' FROM pg_policy p \
                     JOIN pg_class c ON c.oid = p.polrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
                     WHERE p.polrelid IN ({oids}) ORDER BY 2, 3, 1"
                ),
            ),
            (
                "rule",
                format!(
                    "SELECT w.rulename, n.nspname, c.relname, '' FROM pg_rewrite w \
                     JOIN pg_class c ON c.oid = w.ev_class JOIN pg_namespace n ON n.oid = c.relnamespace \
                     WHERE w.ev_class IN ({oids}) ORDER BY 2, 3, 1"
                ),
            ),
            (
                "statistics",
                format!(
                    "SELECT s.stxname, n.nspname, c.relname, sn.nspname FROM pg_statistic_ext s \
                     JOIN pg_namespace sn ON sn.oid = s.stxnamespace \
                     JOIN pg_class c ON c.oid = s.stxrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
                     WHERE s.stxrelid IN ({oids}) ORDER BY 2, 3, 1"
                ),
            ),
        ];
        for (what, sql) in queries {
            for row in texts(self.run(&sql).await?) {
                let [name, schema, table, other] = &*row else { continue };
                let on = format!("{}.{}", quoted(schema), quoted(table));
                let own = quoted(name);
                let sql = match what {
                    "foreign key" => format!("ALTER TABLE {on} DROP CONSTRAINT {own}"),
                    "trigger" => format!("DROP TRIGGER {own} ON {on}"),
                    "policy" => format!("DROP POLICY {own} ON {on}"),
                    "rule" => format!("DROP RULE {own} ON {on}"),
                    _ => format!("DROP STATISTICS {}.{own}", quoted(other)),
                };
                self.run(&sql).await?;
                let to = if what == "foreign key" { format!(" to {other}") } else { String::new() };
                self.left_out.push(format!("{what} {name} of {schema}.{table}{to}"));
            }
        }
        let sql = format!(
            "SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
             WHERE (c.relrowsecurity OR c.relforcerowsecurity) AND c.oid IN ({oids}) ORDER BY 1, 2"
        );
        for row in texts(self.run(&sql).await?) {
            let [schema, table] = &*row else { continue };
            let on = format!("{}.{}", quoted(schema), quoted(table));
            let off = "DISABLE ROW LEVEL SECURITY, NO FORCE ROW LEVEL SECURITY";
            self.run(&format!("ALTER TABLE {on} {off}")).await?;
            self.left_out.push(format!("row level security of {schema}.{table}"));
        }
        Ok(())
    }

    /// Moves what else of a whole schema arrives: sequences, views and types of its own.
    async fn move_others(&mut self, schema: &str, target: &str) -> Result<()> {
        let of = literal(schema);
        let not_an_extensions = |class: &str, object: &str| {
            format!(
                "NOT EXISTS (SELECT FROM pg_depend e WHERE e.classid = '{class}'::regclass AND e.objid = {object} \
                 AND e.deptype = 'e')"
            )
        };
        let relations = format!(
            "SELECT CASE c.relkind WHEN 'S' THEN 'SEQUENCE' WHEN 'v' THEN 'VIEW' ELSE 'MATERIALIZED VIEW' END, \
             c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
             WHERE n.nspname = {of} AND c.relkind IN ('S', 'v', 'm') AND {} \
             AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid \
             AND d.refobjsubid > 0 AND d.deptype IN ('a', 'i') AND c.relkind = 'S') ORDER BY 1, 2",
            not_an_extensions("pg_class", "c.oid")
        );
        let types = format!(
            "SELECT CASE t.typtype WHEN 'd' THEN 'DOMAIN' ELSE 'TYPE' END, t.typname FROM pg_type t \
             JOIN pg_namespace n ON n.oid = t.typnamespace LEFT JOIN pg_class c ON c.oid = t.typrelid \
             WHERE n.nspname = {of} AND (t.typtype IN ('e', 'd') OR (t.typtype = 'c' AND c.relkind = 'c')) AND {} \
             ORDER BY 1, 2",
            not_an_extensions("pg_type", "t.oid")
        );
        for sql in [relations, types] {
            for row in texts(self.run(&sql).await?) {
                let [kind, name] = &*row else { continue };
                self.run(&format!(
                    "ALTER {kind} {}.{} SET SCHEMA {}",
                    quoted(schema),
                    quoted(name),
                    quoted(target)
                ))
                .await?;
            }
        }
        // What stays behind is told where there is any.
        let rest = format!(
            "SELECT 'functions', count(*) FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace \
             WHERE n.nspname = {of} AND {} HAVING count(*) > 0 \
             UNION ALL SELECT 'foreign tables', count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
             WHERE n.nspname = {of} AND c.relkind = 'f' HAVING count(*) > 0",
            not_an_extensions("pg_proc", "p.oid")
        );
        for row in texts(self.run(&rest).await?) {
            let [what, count] = &*row else { continue };
            self.left_out.push(format!("{count} {what} of schema {schema}"));
        }
        Ok(())
    }
}

/// Returns the rows of a query that has no NULLs.
fn texts(rows: Rows) -> Vec<Vec<String>> {
    rows.rows.into_iter().map(|row| row.into_iter().flatten().collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_schemas_arrive_in_several() {
        let names = |schemas: &[&str]| -> Vec<String> {
            let schemas = schemas.iter().map(|schema| (*schema).to_owned()).collect();
            target_names("pitr_extract_20270201t030000z", &schemas).into_values().collect()
        };
        assert_eq!(names(&["public"]), ["pitr_extract_20270201t030000z"]);
        assert_eq!(
            names(&["a", "b c"]),
            ["pitr_extract_20270201t030000z_a", "pitr_extract_20270201t030000z_b c"]
        );
        let long = ["x".repeat(50), "x".repeat(50) + "y", "\u{e9}".repeat(30)];
        let long = names(&long.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(long.iter().collect::<BTreeSet<_>>().len(), 3);
        assert!(long.iter().all(|name| name.len() <= NAME_BYTES_MAX), "{long:?}");
    }
}
